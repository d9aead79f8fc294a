"""One rollout, and one update: no file here but module.py knows Lightning."""
