"""Language models: the policy, its adapters, other versions of it, its forwards, its weights in files."""
