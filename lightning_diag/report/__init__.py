"""Reports: findings and frames as charts, pages and tables."""

from lightning_diag.report.charts import gradient_flow, training
from lightning_diag.report.console import print_summary
from lightning_diag.report.write_report import Report, write_report

__all__ = ["Report", "gradient_flow", "print_summary", "training", "write_report"]
