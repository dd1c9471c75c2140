"""From folders of weights to a model: names, layouts, adapters, and the files beside the
weights."""
