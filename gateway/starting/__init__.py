"""What is known of the first replica of a pool that has none: told by the process that finds and orders replicas, read
by the workers whose requests wait for it."""
