"""Speaking to Kubernetes: which endpoints a service has, and how many pods a workload should have."""
