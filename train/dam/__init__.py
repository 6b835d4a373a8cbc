"""`dmattn dam`: Dynamic Attention Masks for a frozen model, from captured maps to a measured table."""
