"""What MLflow shows of a run beyond its metrics: registered versions, datasets, charts and descriptions."""
