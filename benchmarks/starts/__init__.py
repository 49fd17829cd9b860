"""Initialisations compared: losses at short budgets, and what the initialisation itself costs."""
