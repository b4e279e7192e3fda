"""Features as training signals: the SASFT penalty, thresholds and features for it, and what trainers need to use it."""
