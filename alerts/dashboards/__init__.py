"""The Grafana dashboards, written with the Grafana Foundation SDK.

What ships is the JSON in `grafana/dashboards/`; nothing imports this package while a run is monitored or files are
exported. After a change: `python -m ess_monitor.alerts.dashboards`, with the development dependencies installed.

    parts       panels, queries, variables, and how rows of panels become a dashboard
    fleet       all runs of a job
    run         one run: memory, autopilot, ranks, the monitor itself
    layer       one layer of a run
"""
