import logging

# pytest listens to every logger at every level, and torch's trace log then formats a stack for every symbolic
# size.
logging.getLogger("torch.__trace").propagate = False
