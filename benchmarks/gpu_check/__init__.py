"""Everything that is to be seen on a GPU in one call, for machines that are lent for minutes."""
