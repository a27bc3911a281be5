"""data.sources"""
