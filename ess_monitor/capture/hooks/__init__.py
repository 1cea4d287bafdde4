"""Hooks and patches through which capture and interventions see a model's calls."""
