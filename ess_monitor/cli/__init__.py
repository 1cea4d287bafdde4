"""The command `ess-monitor`: one file a command."""
