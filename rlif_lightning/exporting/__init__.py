"""Write trained weights as folders that other programs load."""
