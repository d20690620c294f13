"""The doors of Caddie: HTTP under /v1, the pages, Optuna's dashboard, a client and the command line."""
