"""The pages of analyses, and their figures."""
