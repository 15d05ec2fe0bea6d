"""What a hostile driver can try, by what it abuses: memory, rings, buffers, messages, amounts. `hostile.ATTACKS` is all of it."""
