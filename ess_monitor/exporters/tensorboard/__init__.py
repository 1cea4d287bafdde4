"""TensorBoard: scalars, histograms, images and text."""
