"""The three doors to the outside: Ray, object storage (fsspec) and MLflow, and what is built right on them."""
