"""data_parallel.transport"""
