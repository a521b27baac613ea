"""The fault drill: small runs that are broken on purpose, and what became of them (`asd-megatron drill`)."""
