"""Units and their members as frozen data; which units are dead; cutting them out of tensors."""
