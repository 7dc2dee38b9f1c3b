"""A web page over collections of statements: browse, neighbours, semantic search. Works without internet."""
