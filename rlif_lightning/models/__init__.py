"""Language models: the policy, its adapters, its references, its forwards, its weights in files."""
