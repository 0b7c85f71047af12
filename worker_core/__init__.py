"""What a worker is, whichever role it has now: an engine in a thread, routers' sessions, both sides of the hand-over.

main -> worker -> session -> jobs -> engine_thread
                              +--> exporter (prefill side)   kvstore.handover.exporter decides
                              +--> puller   (decode side)    kvstore.handover.importer decides
"""
