"""The operators' listener: who may come in, what there is to see and to order, and the pages of the dashboard."""
