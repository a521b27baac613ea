"""The client of SGLang servers: one server's HTTP interface (`api`), and a fleet of servers that answers every sample
once."""
