"""What lies in files: tensors, the format, originals and compressed directories, the output folder, locks,
checksums.
"""
