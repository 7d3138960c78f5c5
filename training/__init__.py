"""Programs around the library: presets, data, training, search, evaluation, report."""
