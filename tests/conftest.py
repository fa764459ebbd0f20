"""Before anything imports torch: one thread in every test and in every process that it starts, so that figures do not depend on the number of cores, and `-n 2` shares them."""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
