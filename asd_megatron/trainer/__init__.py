"""The update: records to packed micro-batches, scoring, the policy-gradient step, the supervised stage."""
