"""What computes with llama.cpp. It starts CUDA when it is imported, and shows it one card before."""

from sg_local.plan.machine import use_one_card

use_one_card()
