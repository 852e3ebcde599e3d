"""The endpoints, one file for each family: a handler takes a call and its checked body and gives a reply."""
