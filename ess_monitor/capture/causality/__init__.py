"""What has to be shown of a layer before it is measured: that T is lower triangular."""
