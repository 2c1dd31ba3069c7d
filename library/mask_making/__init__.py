"""Making masks for pictures that have none: from transparency, colours, brightness, boxes, or a segmentation model."""
