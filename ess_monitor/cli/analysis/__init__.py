"""Commands that analyze a model, one file a command."""
