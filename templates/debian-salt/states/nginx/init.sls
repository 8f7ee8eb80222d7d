nginx:
  pkg.installed:
    - name: nginx-light
    - install_recommends: False
  service.running:
    - enable: True
    - require:
      - pkg: nginx
    - watch:
      - file: site

site:
  file.managed:
    - name: /etc/nginx/sites-available/default
    - source: salt://nginx/site.conf
    - template: jinja
    - require:
      - pkg: nginx

page:
  file.managed:
    - name: /var/www/html/index.html
    - source: salt://nginx/index.html
    - template: jinja
    - require:
      - pkg: nginx

/var/www/html/index.nginx-debian.html:
  file.absent:
    - require:
      - pkg: nginx
