"""unbraid: recommendation and transfer models whose tasks and domains share parameters without hurting each other."""
