"""Connects training frameworks to `ess_monitor.Monitor`.

Import the module of the framework you use, for example `from ess_monitor.integrations.lightning import
ESSMonitorCallback`. The rest of the package imports nothing from here.
"""
