"""Download, read and import the measurements published by the methods' authors."""
