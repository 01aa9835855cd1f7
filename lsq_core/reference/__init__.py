"""Measurements that the methods' authors published: reading, downloading and importing them."""
