"""What is learned: losses, metrics and samples."""
