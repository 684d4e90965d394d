from gpu_init.config import *
