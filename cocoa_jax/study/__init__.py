"""Studies: many short runs that answer questions about the method, as data, in pieces that outlive a kill."""
