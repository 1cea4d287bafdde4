"""Prometheus: scraped, pushed to a Pushgateway, or written to a textfile."""
