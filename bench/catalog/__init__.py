"""Facts about hardware, models, prices and service levels, read from ``configs/``; and the arithmetic that needs only them."""
