"""Exports metrics to Prometheus: scraped, pushed to a Pushgateway, or through a textfile."""
