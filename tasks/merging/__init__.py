"""The merge engine: choose a window, plan from headers, execute in bounded memory, publish."""
