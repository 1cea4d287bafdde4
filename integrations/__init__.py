"""Thin adapters from training frameworks to `ess_monitor.Monitor`. They decide nothing.

Import the module of the framework you use, for example `from ess_monitor.integrations.lightning import
ESSMonitorCallback`. Nothing here is imported by the rest of the package.
"""
