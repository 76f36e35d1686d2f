"""structmat compress"""
def compress(): pass
