"""What people do with a model: density ratios, anomaly scores, denoising, reports."""
