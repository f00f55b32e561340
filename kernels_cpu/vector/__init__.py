"""SIMD in Python: a vector vocabulary that emits LLVM code for each instruction set. Start with simd.py."""
