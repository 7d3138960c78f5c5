"""ddsm_tf"""
